"""Names of a Stable Diffusion's components, as its folders have them."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
