"""Parts of a training step that are faster or smaller than what they replace: the loss of the labelled positions, the heap."""
