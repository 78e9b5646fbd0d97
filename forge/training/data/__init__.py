"""From documents to examples: discovery, corpus, records, token ids and labels."""
