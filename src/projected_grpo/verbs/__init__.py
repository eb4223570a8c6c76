"""The verbs of the command line. Each reads its options, calls the room that does the work, and prints."""
