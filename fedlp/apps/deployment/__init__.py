"""Deployment on SuperLink and SuperNodes: keys, and a rehearsal on one machine."""
