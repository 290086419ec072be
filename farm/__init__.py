"""The engine room of BotFarm: see the list of rooms in botfarm.py."""

VERSION = "0.1.0"
