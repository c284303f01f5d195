"""The CNI plugin: one file that container runtimes call, and what installs it."""
