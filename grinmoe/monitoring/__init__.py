"""What the routers do while a model trains: a Trainer callback, its record and its picture."""

from .callback import ExpertCollapseError, ExpertCollapseWarning, RoutingMonitor
from .plots import draw_load, load_reach, plot_training
from .record import RoutingRecord, kept_experts, routing_sums
