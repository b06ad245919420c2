"""The schedule: which subnetwork runs at which timestep."""
