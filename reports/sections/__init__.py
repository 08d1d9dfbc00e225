"""The sections of a chapter, each a function from a story to a Section; one without data says why it is left out."""
