"""What a denoising task of a diffusion model is, and how hard it is."""
