"""What a job will need on a cluster, computed before anything is moved or trained."""
