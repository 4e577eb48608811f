"""`flashvaed decode`: latents to videos."""
