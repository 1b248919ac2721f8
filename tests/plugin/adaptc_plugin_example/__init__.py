"""A method and a pass for adaptc: all that a package of one's own needs."""

from adaptc_plugin_example.diag_shift import DiagShift as DiagShift
from adaptc_plugin_example.swap_activation import SwapActivation as SwapActivation
