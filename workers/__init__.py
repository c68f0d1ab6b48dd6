"""Queue workers that run the stages of the engine."""
