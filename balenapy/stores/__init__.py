"""Records in SQLite and the directories they name."""
