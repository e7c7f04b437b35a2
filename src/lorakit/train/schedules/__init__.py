"""What training does to an adapter besides optimiser steps."""
