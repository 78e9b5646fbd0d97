"""Records by rule, without a model: what a document says about itself, as questions and exact answers."""
