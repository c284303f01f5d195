"""The commands: `flannelpy NAME ...` calls `main(argv)` of the module of that name."""
