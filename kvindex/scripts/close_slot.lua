-- Takes a worker out of every answer; its entries wait for the sweep.
--
-- KEYS[1]  directory of the pool
-- ARGV     slot, incarnation
-- Returns  1, or 0 if the slot is not this incarnation's

local slot, incarnation = unpack(ARGV)
if not own(slot, incarnation) then
  return 0
end
write_though_full()
fence(slot, 'closed', '')
return 1
