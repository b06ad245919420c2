"""Deployment folders: torch.export programs that run a schedule with torch alone."""
