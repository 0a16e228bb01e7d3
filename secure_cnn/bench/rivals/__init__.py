"""The same work by others, as their own users have it: steps, and files of tensors.

The only room that imports them for the benchmark. A rival that is not installed is named with the
reason, never left out in silence.
"""
