"""Models of transformers: their code, settings, inputs and tasks, as a trace needs them."""
