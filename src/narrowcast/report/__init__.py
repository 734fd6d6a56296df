"""Tables, words and pictures of a record: one outline, rendered in a terminal and as HTML."""
