"""The method, in torch alone: auxiliary parameters, update rules, schedule, pruner."""
