"""Images as a training set, and their latents: encoded once, cached on disk, decoded for looking at.

``image_folder`` lists and reads images, ``autoencoder`` holds the VAE, ``encode`` fills a cache, ``cache``
reads it back, ``decode`` makes pictures of latents. Import from those files: only some need diffusers.
"""
