"""The light door of the command line: what can be answered or refused without torch, which takes seconds to import."""
