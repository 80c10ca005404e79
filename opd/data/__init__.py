"""Raw data: records of files and the hub, public data sets by name, which prompts to keep."""
