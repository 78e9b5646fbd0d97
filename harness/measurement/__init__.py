"""One run or probe in a fresh process: started, watched, keyed, stored."""
