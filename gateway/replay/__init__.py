"""What a fleet would have done with recorded traffic: a simulation that runs the real plan and reserve."""
