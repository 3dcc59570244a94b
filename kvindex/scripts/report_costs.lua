-- Replaces what a worker says of the costs of its steps, or a teller of a store's speed.
--
-- KEYS[1]  directory of the pool
-- ARGV     slot, incarnation, costs as JSON
-- Returns  1; false if the slot is not this incarnation's

local slot, incarnation, costs = unpack(ARGV)
if not own(slot, incarnation) then
  return false
end
write_though_full()
redis.call('HSET', SLOT .. slot, 'costs', costs)
return 1
