"""Tables, profiles and sentences for the terminal: Rich renderables, never printed here."""
