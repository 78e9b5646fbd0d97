"""What a model knows: held-out loss, facts and ROUGE, judged by one neutral evaluator."""
