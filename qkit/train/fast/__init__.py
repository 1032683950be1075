"""Parts of a training step that are faster or need less memory than the library's: the head on labelled positions, the heap."""
