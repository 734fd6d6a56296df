"""Why a training breaks: evidence, verdict, remedies that were tried, the smallest fp32 set."""
