"""The command line `credence`."""
