"""The acceptance gate's parity ladder: is what the fast backend trains as good as what the baseline trains?"""
