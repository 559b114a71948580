"""Configurations of the smallest diffusers models for 8x8 pictures of one channel."""

UNET = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
    "block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
}  # fmt: skip
DIT = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
    "in_channels": 1, "out_channels": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
    "norm_num_groups": 1,
}  # fmt: skip
TEXT = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
    "layers_per_block": 1, "block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4,
    "cross_attention_dim": 6, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
