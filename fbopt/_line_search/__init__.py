"""Line searches: a length t > 0 at which phi(t) = f(p + t d) is small enough.

The searches are arithmetic on numbers; line.py evaluates phi on the parameters themselves, and
closures.py says whose closures a search may see.
"""
