"""What several tests share; a test file imports from here, never another test file."""
