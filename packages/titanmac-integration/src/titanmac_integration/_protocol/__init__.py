"""The retention protocol: tasks in sequence, methods against forgetting, figures as files."""
