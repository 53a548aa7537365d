"""What a deployment on SuperLink and SuperNodes needs beside the apps: keys, and a rehearsal on one machine."""
