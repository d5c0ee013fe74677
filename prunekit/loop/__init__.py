"""The method as a loop: what to cut next, whether it kept enough, what is left to do; loop.sh does what these say."""
