"""The contract both sides read: what a job, a row and a run folder are; standard library only."""
