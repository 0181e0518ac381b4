"""How fast and at what cost: peaks of the machine and the roofline under them, ratios and whether the machine was quiet
(quiet), time by size (scaling, growth), energy and prices, and watching (a kernel's file checked and timed at each
save). What is measured is right first: that is `conform`'s to say."""
