"""What is written in C: the few inner loops that no sequence of torch's operations does as fast.

Installing compiles it where there is a C compiler (`hatch_build.py`). Without it every guarantee is
the same and the private step slower: `private.describe()` then names no kernel `direct`.
"""
