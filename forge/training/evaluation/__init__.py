"""The parts of ``evaluate``: neutral models, likelihoods, greedy answers, ROUGE, the record."""
