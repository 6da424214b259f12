"""Reflectance of the materials that scenes are made of, in percent, for the 13 bands of Sentinel-2 (order of the L1C product).

Values are typical of published spectral libraries, rounded; pixels are mixtures of them.
"""

from __future__ import annotations

import numpy as np

#                    B1    B2    B3    B4    B5    B6    B7    B8   B8A    B9   B10   B11   B12
_PERCENT = {
    "clear water": (2.2, 2.0, 1.6, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1),
    "turbid water": (5.0, 6.0, 8.5, 8.2, 7.5, 5.8, 5.5, 5.2, 4.5, 3.5, 1.0, 1.4, 0.9),
    "broadleaf": (2.0, 2.3, 4.6, 2.6, 8.0, 27.0, 34.0, 36.0, 38.0, 37.0, 8.0, 18.0, 8.0),
    "conifer": (1.6, 1.8, 3.0, 2.0, 5.0, 15.0, 19.0, 20.5, 22.0, 21.5, 5.0, 9.5, 4.2),
    "green herb": (3.0, 3.6, 7.5, 4.2, 11.5, 33.0, 42.0, 44.0, 46.0, 45.0, 10.0, 21.0, 10.5),
    "dry herb": (4.0, 5.0, 8.2, 12.5, 18.0, 21.0, 23.5, 25.5, 28.0, 28.5, 15.0, 36.0, 25.0),
    "dark soil": (4.5, 5.5, 7.5, 9.5, 11.5, 13.0, 14.5, 16.0, 17.5, 18.0, 14.0, 24.0, 20.0),
    "red soil": (4.5, 5.5, 9.0, 16.5, 21.0, 25.5, 27.5, 29.0, 31.5, 32.0, 22.0, 41.0, 35.0),
    "sand": (11.0, 13.5, 20.0, 28.0, 31.0, 33.0, 34.5, 36.0, 38.0, 38.5, 30.0, 50.0, 44.0),
    "rock": (9.0, 10.5, 12.5, 14.5, 16.0, 17.0, 18.0, 19.0, 20.0, 20.5, 18.0, 24.0, 22.0),
    "grey roof": (11.0, 12.8, 16.5, 20.5, 22.5, 24.0, 25.0, 26.5, 28.0, 28.5, 22.0, 34.5, 31.0),
    "red roof": (5.2, 6.2, 9.8, 16.8, 21.0, 24.0, 25.8, 27.2, 29.5, 30.0, 21.0, 38.5, 32.5),
    "asphalt": (5.8, 6.8, 8.6, 10.4, 12.0, 13.0, 14.0, 15.0, 16.0, 16.5, 13.0, 21.0, 18.5),
    "snow": (92.0, 93.0, 92.0, 91.0, 90.0, 88.0, 86.0, 85.0, 82.0, 80.0, 15.0, 9.0, 7.0),
    "ice": (70.0, 72.0, 68.0, 60.0, 55.0, 48.0, 42.0, 40.0, 33.0, 28.0, 3.0, 3.0, 2.0),
}
MATERIALS = tuple(_PERCENT)
REFLECTANCE = np.array(list(_PERCENT.values()), np.float32) / 100  # [materials, 13]
CLOUD = np.array([76, 77, 75, 76, 77, 79, 80, 80, 81, 80, 1, 58, 45], np.float32) / 100
CIRRUS = np.array([50, 50, 49, 49, 49, 50, 50, 50, 50, 46, 38, 38, 30], np.float32) / 100

NATIVE = (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2)  # pixels of 10 m on a side, by band
L2A_BANDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)  # without the cirrus band
BLUE, GREEN, RED, NIR, VAPOUR, CIRRUS_BAND = 1, 2, 3, 7, 9, 10

# Air: Rayleigh optical depth at sea level, share of scattered light, and noise (reflectance) by band.
RAYLEIGH = np.array([0.236, 0.155, 0.090, 0.045, 0.036, 0.030, 0.024, 0.019, 0.016, 0.011, 0.003, 0.001, 0.0004], np.float32)
DIFFUSE = np.array([38, 32, 24, 18, 16, 14, 13, 12, 11, 9, 6, 4, 3], np.float32) / 100
AEROSOL = np.array([150, 130, 105, 85, 78, 74, 70, 65, 62, 57, 35, 30, 20], np.float32) / 100
NOISE = np.array([10, 22, 22, 24, 20, 20, 20, 28, 20, 12, 4, 16, 16], np.float32) / 1e4
