"""The page on which a model is asked, and shows where it looked. Only `page` knows Gradio."""
