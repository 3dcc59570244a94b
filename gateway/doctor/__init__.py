"""What `kvlane doctor` looks at: each check is a pure function from what was seen to findings."""
