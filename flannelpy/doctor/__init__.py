"""What is wrong with a host, and why: pure functions of what was found there. `flannelpy doctor` shows it."""
