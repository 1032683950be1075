"""What several test modules use: models, runs, servers, and the command. No test module imports another."""
