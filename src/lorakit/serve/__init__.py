"""engine, pool, scheduler, cache"""
