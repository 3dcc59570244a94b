-- Takes back what a reservation charged, once.
--
-- KEYS[1]  directory of the pool
-- ARGV     decision id
-- Returns  1, or 0 if it was settled or had expired before

purge(now_ms())
redis.call('HDEL', PENDING, ARGV[1])
return settle(ARGV[1]) and 1 or 0
