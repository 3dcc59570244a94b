"""Measurements that `kvlane bench` prints: what kvlane costs, beside what it is compared with."""
